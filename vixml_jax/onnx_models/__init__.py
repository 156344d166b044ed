"""Text encoders as ONNX models: made of our parameters, quantized to int8, and run by ONNX Runtime on CPUs."""
