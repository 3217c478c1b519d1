"""What happens to a training when machines fail: each fault is made, for real, and the result compared."""
