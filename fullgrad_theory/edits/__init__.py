"""What an edit of a backward pass is, what it costs, and how it is written into a graph."""
