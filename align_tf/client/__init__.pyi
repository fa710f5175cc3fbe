from .align_client import AlignClient as AlignClient
from .async_client import AsyncAlignClient as AsyncAlignClient
from .batches import Classification as Classification
from .endpoint import AlignServerError as AlignServerError, Tls as Tls
from .signatures import (
    Signature as Signature,
    TensorSpec as TensorSpec,
    VersionStatus as VersionStatus,
)
