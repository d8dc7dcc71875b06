# A task of your own, from looking at the data to a page about the runs. From the root of the repository, with the demo's
# model installed (make demo does): sh examples/own_task/run.sh
set -e
fpt show task examples/own_task/tickets.yaml
fpt train --config examples/own_task/recipe.yaml --set output=runs/tickets/plain
fpt train --config examples/own_task/recipe.yaml --set output=runs/tickets/cr --set method=cr
fpt compare runs/tickets/plain runs/tickets/cr
fpt report runs/tickets/plain runs/tickets/cr --output runs/tickets/report.html
fpt predict runs/tickets/plain "I was charged for a month that I did not use"
