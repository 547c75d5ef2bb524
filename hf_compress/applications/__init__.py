"""What trained models are used for: from pictures and videos to tables, events and plots."""
