"""Encoders of texts and images as ONNX models: made of our parameters, rounded to int8, run by ONNX Runtime on CPUs."""
