"""Weight quantization: schemes as rows of data, the algorithm behind them, and the file format of its results."""
