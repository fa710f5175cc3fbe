"""Makes efficientnet_b7.json: the full-size shapes of EfficientNet-B7 in Keras's own code.

The original's image tower is that network without its top, so the names are the original's.

    python tests/goldens/coyo_align/make_efficientnet_b7.py
"""

import json
import pathlib

import keras

LEFT_OUT = ("normalization/", "top_conv/", "top_bn/")


def main() -> None:
    model = keras.applications.EfficientNetB7(include_top=False, weights=None)
    shapes = {
        weight.path: list(weight.shape)
        for weight in model.weights
        if not weight.path.startswith(LEFT_OUT)
    }
    rows = ",\n".join(f"{json.dumps(name)}: {shape}" for name, shape in shapes.items())
    path = pathlib.Path(__file__).with_name("efficientnet_b7.json")
    path.write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main()
