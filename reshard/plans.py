"""Read plans: what each rank would read, as `Checkpoint.plan` returns it."""

from .planner.rank_plans import RankPlans as RankPlans
from .planner.read_plan import ReadPlan as ReadPlan
from .planner.report import PlanReport as PlanReport
from .planner.report import WholeShards as WholeShards
from .planner.request_costs import RequestCosts as RequestCosts
