"""From a packed network to what other runtimes load: ONNX in float and INT8, its accuracy and its latency."""
