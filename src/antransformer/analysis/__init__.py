"""Looking at what runs did."""
