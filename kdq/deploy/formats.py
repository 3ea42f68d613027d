"""What a packed network is exported to."""

#: What files are called, by format.
SUFFIXES = {
    "packed": ".kdq",
    "torch": ".pt2",
    "onnx-fp32": ".fp32.onnx",
    "onnx-int8": ".int8.onnx",
    "onnx-codes": ".codes.onnx",
}
