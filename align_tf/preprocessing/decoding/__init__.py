"""Encoded images to uint8 RGB, with the pixels that Pillow gives.

reading                     any image: by its first bytes to its format
jpeg, png, gif, bmp, webp   a file a format
orientation                 how a photograph is turned
pixels, file_bytes          what the formats share
"""
