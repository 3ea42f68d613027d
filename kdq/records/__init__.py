"""What is kept: trained models, rows of results, failures."""
