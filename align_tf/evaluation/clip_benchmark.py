"""A model as CLIP_benchmark takes one, and its command with models of align_tf.

    python -m align_tf.evaluation.clip_benchmark eval --pretrained my-align --dataset cifar10 \\
        --output "my-align_{dataset}.json" --no_amp

takes what the command `clip_benchmark` takes. Without `--no_amp` it rounds embeddings to 16 bits,
and equal similarities change the figures. In Python, `load` gives what the functions of
`clip_benchmark.metrics` take.
"""

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from align_tf.evaluation.embedder import Embedder, in_batches
from align_tf.extras import extra
from align_tf.models.align import AlignModel
from align_tf.models.fingerprint import load_model
from align_tf.preprocessing.processor import AlignProcessor

with extra("clip-benchmark", "CLIP_benchmark needs extra packages"):
    import torch
    from clip_benchmark import cli, models
    from transformers import BatchEncoding

MODEL_TYPE = "align_tf"  # of CLIP_benchmark's --model_type
# Images are prepared in this process; the name of an architecture has no use.
DEFAULTS = ("--model_type", MODEL_TYPE, "--model", "align", "--num_workers", "0")


class ClipModel(torch.nn.Module):
    """The two towers on torch's tensors, which are what goes in and comes out, and no more.

    Args:
        model: the model.
    """

    def __init__(self, model: AlignModel):
        super().__init__()
        self.embedder = Embedder(model)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Takes pixel_values (n, 3, h, w) to float32 (n, d), of unit length, on their device."""
        pixel_values = images.detach().float().permute(0, 2, 3, 1).cpu().numpy()
        embeds = [self.embedder.images(part) for part in in_batches(pixel_values)]
        return _tensor(embeds).to(images.device)

    def encode_text(self, tokens: BatchEncoding) -> torch.Tensor:
        """Takes what the tokenizer gives of m texts to float32 (m, d), as `encode_image`."""
        arrays = {name: values.cpu().numpy() for name, values in tokens.items()}
        rows = in_batches(range(len(arrays["input_ids"])))
        embeds = [self.embedder.texts({k: v[part] for k, v in arrays.items()}) for part in rows]
        return _tensor(embeds).to(tokens["input_ids"].device)


def load(
    pretrained: str | os.PathLike | AlignModel,
    processor: AlignProcessor | None = None,
    *,
    model_name: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    device: Any = None,
) -> tuple[ClipModel, Any, Any]:
    """Loads a model as CLIP_benchmark does.

    Args:
        pretrained: what `AlignModel.from_pretrained` takes, or the model.
        processor: the model's; None loads it by the model's name.
        model_name: an architecture, of no matter here.
        cache_dir: the hub's cache folder.
        device: of torch's tensors: the towers run where Keras's backend puts them, and
            embeddings go where the inputs are.

    Returns:
        The model; what takes a PIL image to float32 (3, h, w); and what takes texts to tokens.

    Raises:
        FileNotFoundError, ValueError: as `AlignModel.from_pretrained`, or there is a model and no
            processor.
    """
    if cache_dir is not None and not isinstance(pretrained, AlignModel):
        processor = processor or AlignProcessor.from_pretrained(pretrained, cache_dir=cache_dir)
        pretrained = AlignModel.from_pretrained(pretrained, cache_dir=cache_dir)
    model, processor = load_model(pretrained, processor)
    prepare = (functools.partial(part, processor) for part in (_transform, _tokenize))
    return ClipModel(model), *prepare


def main(words: Sequence[str]) -> None:
    """Runs the command `clip_benchmark` with models of align_tf.

    Args:
        words: what follows the command's name.
    """
    if words[:1] == ["eval"]:
        if not any(word.startswith("--output") for word in words):
            # It would name the file after the checkpoint, whose name may hold slashes.
            sys.exit('--output: expected a file, such as "my-align_{dataset}_{task}.json"')
        words = ["eval", *DEFAULTS, *words[1:]]
    # Of a GPU that both libraries use neither takes all memory at once.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    models.TYPE2FUNC[MODEL_TYPE] = _load_or_exit
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)
    sys.argv[1:] = words
    try:
        cli.main()
    except FileNotFoundError as error:  # what a data set consists of
        sys.exit(f"clip_benchmark: {error}")


def _load_or_exit(*args: Any, **options: Any) -> tuple[ClipModel, Any, Any]:
    try:
        return load(*args, **options)
    except (OSError, ValueError) as error:
        sys.exit(f"clip_benchmark: {error}")


def _transform(processor: AlignProcessor, image: Any) -> torch.Tensor:
    if torch.utils.data.get_worker_info() is not None:
        raise RuntimeError(
            "num_workers: expected 0, since TensorFlow, which prepares the images, does not run in "
            "a DataLoader's workers"
        )
    pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _tokenize(processor: AlignProcessor, texts: str | Sequence[str]) -> BatchEncoding:
    tokens = processor(text=texts, padding="longest", return_tensors="np")
    return BatchEncoding(dict(tokens), tensor_type="pt")


def _tensor(embeds: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(embeds).astype(np.float32))


if __name__ == "__main__":
    main(sys.argv[1:])
