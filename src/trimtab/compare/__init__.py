"""Several methods on one task: the runs, the choice of their settings, and the table and page that come of them."""
