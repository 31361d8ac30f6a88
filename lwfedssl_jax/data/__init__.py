"""Images and labels, and which client owns which example."""
