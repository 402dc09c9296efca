"""A tiny model learns to use a calculator: task, data, model, reward and evaluation."""
