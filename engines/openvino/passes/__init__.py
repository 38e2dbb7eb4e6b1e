"""Changes to a graph of OpenVINO between reading and compiling it; `ov` is the package openvino in each of them."""
