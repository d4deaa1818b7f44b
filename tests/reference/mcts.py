"""The search forest in plain Python: the same algorithm as the Rust core, written to be read.

Plans are tuples, nodes and edges live in dictionaries keyed by them, and nothing is cached. `tests/property/
test_forest_reference.py` checks that both ask the same plans in the same order, to the last bit of every score.

How it works, for one tree:

* The root is the identity plan. An *edit* turns one EXECUTE into SKIP (edit l) or REPEAT (edit L + l). The children of
  a plan are all plans with one edit more that keep the caps, whatever the order in which the edits came.
* A *descent* starts at the root and takes the best-scored child until it meets a plan that was never asked. Children
  below which nothing is left to ask are passed over.
* A *round* is `round_size` descents; each one is marked open along its path, which lowers the scores there, so that the
  next one looks elsewhere. When the last reward of a round has been told, all of them are learned in order.
"""

import math
from dataclasses import dataclass, field

from dynadepth.tree_search.forest import EditPrior, SearchConfig
from tests.reference.posterior import Climber, variances

MASK = 2**64 - 1
LEAST_WEIGHT = 1e-9


class SplitMix64:
    def __init__(self, seed):
        self.state = seed & MASK

    @classmethod
    def keyed(cls, seed, key):
        return cls(cls(cls(seed).next() ^ key).next())

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        bits = self.state
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return bits ^ (bits >> 31)

    def unit(self):
        return (self.next() >> 11) / 2**53

    def below(self, limit):
        return (self.next() * limit) >> 64


class Rules:
    """What does not depend on a tree: legal plans, values, and what is believed of each edit at the start."""

    def __init__(self, num_layers, config):
        self.num_layers = num_layers
        self.config = config
        self.max_visits = math.floor(config.max_depth * num_layers + 1e-9)
        self.identity = (1,) * num_layers

    def apply(self, plan, edit):
        """The plan after an edit, or None if its layer is already edited."""
        layer = edit % self.num_layers
        if plan[layer] != 1:
            return None
        return (*plan[:layer], 0 if edit < self.num_layers else 2, *plan[layer + 1 :])

    def is_legal(self, plan):
        return (
            1 <= sum(plan) <= self.max_visits
            and plan.count(2) <= self.config.max_repeats
            and len(plan) - plan.count(1) <= self.config.max_edits
            and all(plan[layer] == 1 for layer in self.config.protect)
        )

    def legal_edits(self, plan):
        """All (edit, child) by ascending edit."""
        children = [(edit, self.apply(plan, edit)) for edit in range(2 * self.num_layers)]
        return [(edit, child) for edit, child in children if child and self.is_legal(child)]

    def parents(self, plan):
        """All (edit, parent) by ascending layer; the edit leads from the parent to the plan."""
        parents = []
        for layer, action in enumerate(plan):
            if action != 1:
                edit = layer if action == 0 else self.num_layers + layer
                parents.append((edit, (*plan[:layer], 1, *plan[layer + 1 :])))
        return parents

    def reachable_edits(self):
        """Edits that some legal plan contains. At most one skip is needed to make room for one repeat."""
        reachable = set()
        for edit, child in [(e, self.apply(self.identity, e)) for e in range(2 * self.num_layers)]:
            with_a_skip = [
                self.apply(child, skip)
                for skip in range(self.num_layers)
                if skip != edit % self.num_layers
            ]
            if any(self.is_legal(plan) for plan in [child, *with_a_skip]):
                reachable.add(edit)
        return sorted(reachable)

    def depth(self, plan):
        return sum(plan) / self.num_layers

    def value(self, plan, reward):
        return reward - self.config.depth_penalty * self.depth(plan)

    def signal(self, plan, reward):
        return reward if self.config.selection == "drllm" else self.value(plan, reward)


class Beliefs:
    """Effect and weight of each edit, from the prior."""

    def __init__(self, rules, prior):
        config, num_layers = rules.config, rules.num_layers
        step = 0.0 if config.selection == "drllm" else config.depth_penalty / num_layers
        reachable = rules.reachable_edits()
        self.effect = [0.0] * (2 * num_layers)
        for edit in reachable:
            mean = float(prior.mean[edit]) if prior else 0.0
            self.effect[edit] = mean + step if edit < num_layers else mean - step
        sizes = sorted(abs(self.effect[edit]) for edit in reachable)
        median = sizes[len(sizes) // 2] if sizes else 0.0
        self.spread = median if median > 0 else 1.0
        best = max((self.effect[edit] for edit in reachable), default=0.0)
        self.weight = [LEAST_WEIGHT] * (2 * num_layers)
        for edit in reachable:
            scaled = (self.effect[edit] - best) / (config.temperature * self.spread)
            self.weight[edit] = max(math.exp(scaled), LEAST_WEIGHT)
        self.variance, self.scale = variances(prior, reachable, 2 * num_layers, self.spread)
        self.measured = prior is not None


@dataclass
class Node:
    signal: float  # the plan's own; what was expected of it, until it is told
    told: bool = False
    count: int = 0  # told descents through or to it
    open: int = 0
    total: float = 0.0  # of the signals at the ends of these descents
    complete: bool = False


@dataclass
class Edge:
    count: int = 0
    open: int = 0


@dataclass
class Evaluation:
    plan: tuple
    path: list | None  # edits from the root; None outside the graph
    reward: float | None = None


@dataclass
class Tree:
    rules: Rules
    rng: SplitMix64
    nodes: dict = field(default_factory=dict)
    edges: dict = field(default_factory=dict)
    evaluations: list = field(default_factory=list)
    learned: int = 0
    issued: int = 0
    spent: int = 0
    spreads: list = field(default_factory=list)
    changes: dict = field(default_factory=dict)
    climber: Climber | None = None
    stopped: bool = False

    def open_search(self):
        self.nodes[self.rules.identity] = Node(0.0)
        self.record([])
        self.spent = 1

    def open_probe(self):
        self.open_search()
        for edit in self.rules.reachable_edits():
            plan = self.rules.apply(self.rules.identity, edit)
            if self.rules.is_legal(plan):
                self.nodes[plan] = Node(0.0)
                self.record([edit])
            else:
                self.evaluations.append(Evaluation(plan, None))

    def settled(self):
        return all(evaluation.reward is not None for evaluation in self.evaluations)

    def plans_on(self, path):
        plans = [self.rules.identity]
        for edit in path:
            plans.append(self.rules.apply(plans[-1], edit))
        return plans

    def record(self, path):
        plans = self.plans_on(path)
        for plan in plans:
            self.nodes[plan].open += 1
        for step in zip(plans, path, strict=False):
            self.edges.setdefault(step, Edge()).open += 1
        self.evaluations.append(Evaluation(plans[-1], path))

    def learn(self, beliefs):
        if self.rules.config.selection == "posterior":
            self.learn_gains(beliefs)
            return
        root = self.nodes[self.rules.identity]
        for evaluation in self.evaluations[self.learned :]:
            if evaluation.path is None:
                continue
            signal = self.rules.signal(evaluation.plan, evaluation.reward)
            plans = self.plans_on(evaluation.path)
            for plan in plans:
                node = self.nodes[plan]
                node.open, node.count, node.total = (
                    node.open - 1,
                    node.count + 1,
                    node.total + signal,
                )
            for step in zip(plans, evaluation.path, strict=False):
                self.edges[step].open -= 1
                self.edges[step].count += 1
            leaf = self.nodes[evaluation.plan]
            leaf.signal, leaf.told = signal, True
            for edit, parent in self.rules.parents(evaluation.plan):
                if parent in self.nodes and self.nodes[parent].told:
                    changed, times = self.changes.get(edit, (0.0, 0))
                    change = signal - self.nodes[parent].signal
                    self.changes[edit] = (changed + change, times + 1)
            if evaluation.path:
                self.spreads.append(abs(signal - root.signal))
        self.learned = len(self.evaluations)

    def learn_gains(self, beliefs):
        if self.climber is None:
            self.climber = Climber(self.rules, beliefs)
        values = [self.rules.value(one.plan, one.reward) for one in self.evaluations]
        told = []
        for index in range(self.learned, len(self.evaluations)):
            one = self.evaluations[index]
            if one.plan not in self.climber.asked:
                self.climber.add(one.plan)
            if index > 0:
                told.append((values[index] - values[0], one.plan))
        self.climber.tell(told)
        self.learned = len(self.evaluations)

    def climb(self, count):
        if self.climber.is_done():
            self.stopped = True
            return
        for _ in range(count):
            plan = self.climber.next(self.rng)
            if plan is None:
                return
            self.climber.add(plan)
            self.evaluations.append(Evaluation(plan, None))
            self.spent += 1

    def choose_round(self, beliefs):
        config = self.rules.config
        count = min(config.round_size, max(0, config.max_evaluations - self.spent))
        if config.selection == "posterior":
            if not self.stopped:
                self.climb(count)
            return
        for _ in range(count):
            path = self.descend(beliefs)
            if path is None:
                return
            self.record(path)
            self.spent += 1

    def descend(self, beliefs):
        path = []
        while True:
            plan = self.plans_on(path)[-1]
            children = [
                (edit, child)
                for edit, child in self.rules.legal_edits(plan)
                if child not in self.nodes or not self.nodes[child].complete
            ]
            if children:
                edit, child = self.choose_child(plan, children, beliefs)
                path.append(edit)
                if child not in self.nodes:
                    self.nodes[child] = Node(self.nodes[plan].signal + self.effect(edit, beliefs))
                    return path
            else:
                self.nodes[plan].complete = True
                if not path:
                    return None
                path.pop()

    def choose_child(self, plan, children, beliefs):
        config = self.rules.config
        if config.random_child > 0 and self.rng.unit() < config.random_child:
            return children[self.rng.below(len(children))]
        total_weight = 0.0
        for edit, _ in self.rules.legal_edits(plan):
            total_weight += beliefs.weight[edit]
        scores = [
            self.score(plan, edit, child, beliefs.weight[edit] / total_weight, beliefs)
            for edit, child in children
        ]
        return children[scores.index(max(scores))]

    def score(self, plan, edit, child, probability, beliefs):
        config = self.rules.config
        parent = self.nodes[plan]
        unit = self.unit(beliefs)
        node = self.nodes.get(child)
        edge = self.edges.get((plan, edit), Edge())
        if node is None:
            mean = parent.signal + self.effect(edit, beliefs)
        else:
            mean = node.total / node.count if node.count else node.signal
            if node.open:
                mean = mean - config.virtual_loss * unit * (node.open / (node.count + node.open))
        visits_above, visits = parent.count + parent.open, edge.count + edge.open
        if config.selection == "puct":
            bonus = config.exploration * unit * probability * math.sqrt(visits_above) / (1 + visits)
            return (mean + bonus, 0.0)
        cost = config.depth_penalty * self.rules.depth(child)
        if node is None:
            return (math.inf, mean - cost)
        bonus = config.exploration * math.sqrt(math.log(visits_above) / max(visits, 1))
        return (mean + bonus - cost, 0.0)

    def effect(self, edit, beliefs):
        if edit not in self.changes:
            return beliefs.effect[edit]
        changed, times = self.changes[edit]
        weight = self.rules.config.prior_weight
        return (weight * beliefs.effect[edit] + changed) / (weight + times)

    def unit(self, beliefs):
        ordered = sorted(self.spreads)
        median = ordered[len(ordered) // 2] if ordered else 0.0
        return median if median > 0 else beliefs.spread

    def best(self):
        candidates = [
            (-self.rules.value(one.plan, one.reward), sum(one.plan), one.plan)
            for one in self.evaluations
            if one.reward is not None and self.rules.is_legal(one.plan)
        ]
        return min(candidates)[2]


class ReferenceForest:
    def __init__(self, num_layers, tree_keys, *, config: SearchConfig, seed, prior=None):
        self.rules = Rules(num_layers, config)
        self.trees = [Tree(self.rules, SplitMix64.keyed(seed, int(key))) for key in tree_keys]
        self.prior = prior
        self.beliefs = None
        self.turn = 0
        hashes = [SplitMix64.keyed(~seed & MASK, int(key)).next() for key in tree_keys]
        ranked = sorted(range(len(hashes)), key=lambda tree: hashes[tree])
        self.probed = [] if prior else sorted(ranked[: config.probe_trees])
        for tree in self.probed:
            self.trees[tree].open_probe()
        if not self.probed:
            self.start_search()

    def ask(self, max_plans):
        """Hands out one plan for each tree in turn until enough; returns (tree, ticket, plan), sorted."""
        shares = [0] * len(self.trees)
        for _ in range(max_plans):
            order = [(self.turn + step) % len(self.trees) for step in range(len(self.trees))]
            waiting = [
                tree
                for tree in order
                if self.trees[tree].issued + shares[tree] < len(self.trees[tree].evaluations)
            ]
            if not waiting:
                break
            chosen = waiting[0]
            shares[chosen] += 1
            self.turn = (chosen + 1) % len(self.trees)
        asked = []
        for number, (tree, share) in enumerate(zip(self.trees, shares, strict=True)):
            asked += [
                (number, (number << 32) | index, tree.evaluations[index].plan)
                for index in range(tree.issued, tree.issued + share)
            ]
            tree.issued += share
        return asked

    def tell(self, tickets, rewards):
        touched = set()
        for ticket, reward in zip(tickets, rewards, strict=True):
            tree, index = int(ticket) >> 32, int(ticket) & 0xFFFFFFFF
            self.trees[tree].evaluations[index].reward = float(reward)
            touched.add(tree)
        if self.beliefs is None:
            if all(self.trees[tree].settled() for tree in self.probed):
                self.prior = self.measured_prior()
                self.start_search()
            return
        for tree in sorted(touched):
            if self.trees[tree].settled():
                self.trees[tree].learn(self.beliefs)
                self.trees[tree].choose_round(self.beliefs)

    def start_search(self):
        self.beliefs = Beliefs(self.rules, self.prior)
        for tree in self.trees:
            if tree.evaluations:
                tree.learn(self.beliefs)
                tree.choose_round(self.beliefs)
            else:
                tree.open_search()

    def measured_prior(self):
        num_edits = 2 * self.rules.num_layers
        prior = EditPrior([math.nan] * num_edits, [math.nan] * num_edits, len(self.probed))
        for edit in self.rules.reachable_edits():
            plan = self.rules.apply(self.rules.identity, edit)
            total, changes = 0.0, []
            for tree in self.probed:
                rewards = {one.plan: one.reward for one in self.trees[tree].evaluations}
                changes.append(rewards[plan] - rewards[self.rules.identity])
                total += changes[-1]
            prior.mean[edit] = total / len(changes)
            squares = 0.0
            for change in changes:
                squares += (change - prior.mean[edit]) * (change - prior.mean[edit])
            prior.variance[edit] = squares / max(1, len(changes) - 1)
        return prior

    @property
    def finished(self):
        return self.beliefs is not None and all(tree.settled() for tree in self.trees)
