from .align_client import AlignClient as AlignClient
from .async_client import AsyncAlignClient as AsyncAlignClient
from .batches import Classification as Classification
from .endpoint import AlignServerError as AlignServerError
from .endpoint import Tls as Tls
from .signatures import (
    Signature as Signature,
)
from .signatures import (
    TensorSpec as TensorSpec,
)
from .signatures import (
    VersionStatus as VersionStatus,
)
