"""Our calibration inside other pruning libraries; one module per library, imported only when asked for."""
