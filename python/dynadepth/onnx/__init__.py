"""Policies as ONNX files, and their decisions by onnxruntime."""
