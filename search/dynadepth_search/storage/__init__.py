"""What long runs keep on disk: labels, score tables, finished steps; a killed run goes on with them."""
