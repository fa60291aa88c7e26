"""What a run really costs: the meter, its ledgers, prices, receipts and reports."""
