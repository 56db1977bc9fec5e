"""What `segue calibrate` is made of: which steps to measure, how, and what to print."""
