"""transport: tensors between ranks over raw sockets."""
