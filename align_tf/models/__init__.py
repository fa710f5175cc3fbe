"""The models: an image tower and a text tower trained to agree.

align           AlignModel, over both towers
contrastive     its training: loss, metrics and steps inside Keras's `fit`, which fit_watch watches
text, vision    the towers, over the blocks in bert and efficientnet
pretrained      reading and writing checkpoints; weight_files: Keras's own files
fingerprint     what tells a model from another
exports         shapes of the outputs, and Keras's own export
adapters        LoRA on AlignModel, in PEFT's files; on one layer: lora
freezing        by tower and block, and under Keras's own `trainable`
inputs          as callers of Keras and of Hugging Face give them
loss            the losses of all pairs, over all replicas
quantization    in a configuration, for `.keras` files
effective_weights, plain_copy       without LoRA and quantization: what is saved and exported
accumulation    a batch in parts (GradCache)
sharded_state   weights and optimizer in parts on the devices of a batch (ZeRO)
ghost_batch_norm    statistics of parts of a batch
fused_training, block_loop, remat, packing, folding, inference_copy
                what makes them fast or small
activation, configured, initialization, outputs, step_state, surgery   what they share
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
