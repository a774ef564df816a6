"""The mathematics everything else stands on: schedules, predictions, times, batches and draws. Imports torch only."""
