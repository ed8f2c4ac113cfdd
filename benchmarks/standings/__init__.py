"""What the runs of the standard comparison show, as a page of the documentation."""
