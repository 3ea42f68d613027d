"""Images: what is read (sets, folder), how it is divided (split), and how it reaches the network (augment, loader)."""
