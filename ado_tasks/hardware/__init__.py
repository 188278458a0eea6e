"""The machine: what it is (fingerprint), and what things cost on it (latency, memory)."""
