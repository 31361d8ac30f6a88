"""The methods of the papers: objectives, stages, the client's step, aggregation, and additions to these."""
