"""Writes ops.txt: the ops, with attributes, that the stock TensorFlow Serving images register.

    python make_ops.py FOLDER

FOLDER holds the wheels that WHEELS names, from PyPI, for this Python and machine; nothing of them
is installed. An image registers the core ops of its TensorFlow, and those of the tensorflow-text
that TensorFlow Serving's WORKSPACE names for it. They are read from the wheels' libraries, by
TF_GetAllOpList, not from an image.
"""

import ctypes
import pathlib
import subprocess
import sys
import tempfile
import zipfile

# server: (tensorflow-cpu, tensorflow-text, the TensorFlow that this tensorflow-text loads into)
WHEELS = {
    "2.18": ("2.18.0", "2.12.1", "2.12.0"),
    "2.19": ("2.19.0", "2.12.1", "2.12.0"),
    "2.20": ("2.20.0", "2.20.0", "2.20.0"),
}


class Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("free", ctypes.c_void_p)]


def load(wheels: list[pathlib.Path]) -> bytes:
    """Returns the OpList of a process that has loaded the libraries of these wheels."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [n for n in archive.namelist() if ".so" in n])
        root = pathlib.Path(folder)
        libraries = [
            *root.glob("tensorflow/libtensorflow_framework.so.2"),
            *root.glob("tensorflow/libtensorflow_cc.so.2"),
            *root.glob("tensorflow_text/**/libpybinds_library_common.so"),
            *sorted(root.glob("tensorflow_text/python/ops/_*.so")),
        ]
        for library in libraries:
            loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            if library.name == "libtensorflow_cc.so.2":
                api = loaded
        api.TF_GetAllOpList.restype = ctypes.POINTER(Buffer)
        buffer = api.TF_GetAllOpList().contents
        return ctypes.string_at(buffer.data, buffer.length)


def op_list(folder: pathlib.Path, *packages: tuple[str, str]) -> dict:
    from tensorflow.core.framework import op_def_pb2

    wheels = [next(folder.glob(f"{name}-{version}-*.whl")) for name, version in packages]
    command = [sys.executable, __file__, "--load", *wheels]  # one process, one TensorFlow
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return {op.name: op for op in op_def_pb2.OpList.FromString(output).op}


def main() -> None:
    if sys.argv[1] == "--load":
        sys.stdout.buffer.write(load([pathlib.Path(wheel) for wheel in sys.argv[2:]]))
        return
    folder = pathlib.Path(sys.argv[1])
    registered = {}  # (op, attribute or ""): the servers
    for server, (core, text, text_core) in WHEELS.items():
        ops = op_list(folder, ("tensorflow_cpu", core))
        base = op_list(folder, ("tensorflow_cpu", text_core))
        both = op_list(folder, ("tensorflow_cpu", text_core), ("tensorflow_text", text))
        ops |= {name: op for name, op in both.items() if name not in base}
        for name, op in ops.items():
            registered.setdefault((name, ""), []).append(server)
            for attr in op.attr:
                required = "" if attr.HasField("default_value") else "!"
                registered.setdefault((name, attr.name + required), []).append(server)
    lines = {}
    for (name, attr), servers in sorted(registered.items()):
        where = "" if len(servers) == len(WHEELS) else "@" + ",".join(servers)
        lines[name] = f"{lines[name]} {attr}{where}" if attr else name + where
    target = pathlib.Path(__file__).with_name("ops.txt")
    target.write_text("".join(f"{line}\n" for line in lines.values()))


if __name__ == "__main__":
    main()
