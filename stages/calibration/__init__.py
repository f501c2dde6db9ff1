"""What a model's matrices read on sample text: the weights that quantization gives to the errors of each column."""
