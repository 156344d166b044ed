"""The blend: ranks labels by a small trained model over prototype scores, neighbor votes and words."""
