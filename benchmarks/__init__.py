"""One command for each table of the README; results/ holds dated logs."""
