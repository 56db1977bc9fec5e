"""What `segue bench` is made of: pure schedules, verdicts and reports; one client; the loop that sends."""
