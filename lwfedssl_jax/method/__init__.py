"""The method of the papers: objectives, stages, the client's step, aggregation, and what can be added to them."""
