"""Models as ONNX graphs that are checked against the Engine; `tdm_r1.exported` runs them."""
