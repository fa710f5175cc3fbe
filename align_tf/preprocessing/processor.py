"""AlignProcessor: images and texts to the model's inputs, behind one call."""

import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from align_tf import hub
from align_tf.preprocessing.batch_feature import BatchFeature, as_tensors
from align_tf.preprocessing.image_processing import AlignImageProcessor
from align_tf.preprocessing.tokenization import AlignTokenizer


class AlignProcessor:
    """Prepares images and texts for AlignModel.

    Args:
        image_processor: the image half.
        tokenizer: the text half.
    """

    def __init__(self, image_processor: AlignImageProcessor, tokenizer: AlignTokenizer):
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    @classmethod
    @hub.names_options
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "AlignProcessor":
        """Reads both halves of a checkpoint folder, a hub id or `align-tiny`.

        Args:
            name_or_path: as `hub.resolve_folder` takes it.
            revision: branch, tag or commit on the hub.
            token: access token of the hub.
            cache_dir: the hub's cache folder.
            local_files_only: never ask the hub, use its cache.
        """
        options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        return cls(
            AlignImageProcessor.from_pretrained(name_or_path, **options),
            AlignTokenizer.from_pretrained(name_or_path, **options),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.image_processor!r}, {self.tokenizer!r})"

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes both halves to a checkpoint folder."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads both halves to the Hugging Face hub, beside the model that is there.

        Args:
            repo_id: such as `me/my-align`; made if it is not there.
            private: whether a new repository is seen by its owner alone.
            token: access token of the hub.
            revision: the branch.
            commit_message: of the commit.
            create_pr: propose it instead.

        Returns:
            The commit's address.

        Raises:
            ValueError: the repository's name is none.
            OSError: the hub refuses, or is not reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(
                pathlib.Path(folder),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = None,
        padding: str | bool = "max_length",
        max_length: int | None = 64,
        truncation: bool = True,
        images_kwargs: Mapping[str, Any] | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """Prepares images, texts or both.

        Args:
            images: as AlignImageProcessor takes them.
            text: a string or several, m.
            return_tensors: `tf` or `np`. Without it, what Keras's backend takes: TensorFlow
                tensors on TensorFlow, NumPy arrays elsewhere.
            padding: as AlignTokenizer takes it.
            max_length: as AlignTokenizer takes it.
            truncation: as AlignTokenizer takes it.
            images_kwargs: settings of the image processor, for this call.
            text_kwargs: padding, max_length and truncation, for this call.
            common_kwargs: return_tensors, for this call.

        Returns:
            input_ids, token_type_ids and attention_mask int32 (m, t), pixel_values float32
            (n, h, w, 3): what there is a text or an image for.

        Raises:
            ValueError: there is neither image nor text, an image cannot be read, or a setting
                is unknown.
            FileNotFoundError: a path is no file.
        """
        if images is None and text is None:
            raise ValueError("expected images, text or both, found neither")
        text_settings = {
            "padding": padding,
            "max_length": max_length,
            "truncation": truncation,
            **(text_kwargs or {}),
        }
        common = {"return_tensors": return_tensors, **(common_kwargs or {})}
        _check_names("text_kwargs", text_settings, ("padding", "max_length", "truncation"))
        _check_names("common_kwargs", common, ("return_tensors",))
        output = {}
        if text is not None:
            output.update(self.tokenizer(text, return_tensors="tf", **text_settings))
        if images is not None:
            settings = dict(images_kwargs or {})
            output.update(self.image_processor(images, return_tensors="tf", **settings))
        return as_tensors(output, common["return_tensors"])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Joins the tokens of one sequence of ids into text."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Joins the tokens of each sequence of ids into text."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens)


def _check_names(where: str, settings: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; expected {', '.join(known)}")
