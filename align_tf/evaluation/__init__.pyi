from .confusion import class_figures as class_figures, confusion_matrix as confusion_matrix
from .embedder import Embedder as Embedder
from .examples import holdout as holdout
from .linear_probe import linear_probe_metrics as linear_probe_metrics
from .nearest_neighbors import knn_metrics as knn_metrics
from .retrieval import distinct_pairs as distinct_pairs, retrieval_metrics as retrieval_metrics
from .zero_shot import (
    class_embeddings as class_embeddings,
    zero_shot_metrics as zero_shot_metrics,
    zero_shot_predictions as zero_shot_predictions,
)
