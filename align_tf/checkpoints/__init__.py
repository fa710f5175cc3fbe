"""Checkpoints: the weights of a model in files.

import_plan     every weight of a model paired with a tensor, or an error
tensors         the weight files of a folder, read and written
adapters        LoRA in the files of Hugging Face's PEFT
name_table      what Hugging Face and Keras call each weight
original        the format of the original training code
"""
