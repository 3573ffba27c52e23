"""Where keys and values live: bounded windows for RoPE layers, growing stores for NoPE layers."""
