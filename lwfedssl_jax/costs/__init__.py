"""What a stage costs a device: traffic, operations, memory, and which devices can afford it."""
