"""What the curves of a run say about its health, for the doctor's report and for alarms while it trains."""
