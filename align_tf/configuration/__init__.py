"""Configurations of the towers and of the joint model.

align           the joint model's
text, vision    the towers'
blocks          the block table that an image tower's implies
presets         named architectures
config_file     config.json, read and written
checks          what a value has to be
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
