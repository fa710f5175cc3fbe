from .dataset import make_dataset as make_dataset, records as records
from .writers import write_tfrecords as write_tfrecords
