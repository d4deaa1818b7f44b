"""The search by a posterior in plain Python, to the last bit of what Rust does; `tests/reference/mcts.py` drives it.

The gain of a plan over the identity is Gaussian: its edits' effects, an interaction of each pair of them, and noise.
The mean of the posterior is that of a Gaussian process over plans, its variance that of a linear model in which
interactions are noise. A descent goes from the identity plan to the child of highest
mean + exploration * deviation while that rises, and asks the best plan that it met and that was never asked.
"""

import math

SCALE_WEIGHT, OFFSET, SHRUNK_BY, MOST_POINTS = 4.0, 0.05, 4.0, 512
# Factors of the interaction and the noise; a tree goes by the model under which its gains are likeliest.
LADDER = [(1.0, 1.0), (0.0, 1.0), (1.0, 20.0), (0.0, 20.0)]
# How far every second plan, which looks closely, is led by what is unknown.
CLOSELY = 0.2


def variances(prior, reachable, num_edits, spread):
    """Variance of each edit in units of the mean one, and the mean."""
    total = 0.0
    for edit in reachable if prior else []:
        total += float(prior.variance[edit])
    mean = total / max(1, len(reachable))
    if not mean > 0.0:
        return [1.0] * num_edits, spread * spread
    count = float(max(1, prior.count))
    variance = [1.0] * num_edits
    for edit in reachable:
        own = count * float(prior.variance[edit]) / mean
        variance[edit] = (own + SHRUNK_BY) / (count + SHRUNK_BY)
    return variance, mean * (1.0 + 1.0 / count)


class Posterior:
    def __init__(self, beliefs, interaction, noise):
        self.beliefs, self.interaction, self.noise = beliefs, interaction, noise
        self.num_edits = len(beliefs.effect)
        self.offset = OFFSET if beliefs.measured else 1.0
        self.points, self.rows, self.forward, self.weights = [], [], [], []
        self.scale = beliefs.scale
        self.covariance = [
            [
                self.offset
                if (row < self.num_edits // 2) == (column < self.num_edits // 2)
                else 0.0
                for column in range(self.num_edits)
            ]
            for row in range(self.num_edits)
        ]
        for edit in range(self.num_edits):
            self.covariance[edit][edit] += beliefs.variance[edit]

    def counts(self, edits):
        skips = sum(edit < self.num_edits // 2 for edit in edits)
        return float(skips), float(len(edits) - skips)

    def covariance_of(self, left, right):
        both = [edit for edit in left if edit in right]
        total = 0.0
        for edit in both:
            total += self.beliefs.variance[edit]
        total += self.interaction * (len(both) * (len(both) - 1.0) / 2.0)
        (skips, repeats), (others, again) = self.counts(left), self.counts(right)
        total += self.offset * (skips * others + repeats * again)
        return total + self.noise

    def add(self, edits):
        if len(self.points) == MOST_POINTS or not edits:
            return
        row = []
        for point, above in zip(self.points, self.rows, strict=True):
            entry = self.covariance_of(edits, point)
            for left, right in zip(row, above, strict=False):
                entry -= left * right
            row.append(entry / above[len(row)])
        own = self.covariance_of(edits, edits) + self.noise
        for entry in row:
            own -= entry * entry
        self.rows.append([*row, math.sqrt(max(own, self.noise))])
        self.points.append(edits)
        towards = [0.0] * self.num_edits
        for edit in edits:
            for other in range(self.num_edits):
                towards[other] += self.covariance[edit][other]
        total = 2.0 * self.noise
        total += self.interaction * (len(edits) * (len(edits) - 1.0) / 2.0)
        for edit in edits:
            total += towards[edit]
        for one in range(self.num_edits):
            if towards[one] != 0.0:
                factor = towards[one] / total
                for other in range(self.num_edits):
                    self.covariance[one][other] -= factor * towards[other]

    def tell(self, gains):
        for gain in gains:
            index = len(self.forward)
            if index == len(self.points):
                break
            residual = gain
            for edit in self.points[index]:
                residual -= self.beliefs.effect[edit]
            for entry, known in zip(self.rows[index], self.forward, strict=False):
                residual -= entry * known
            self.forward.append(residual / self.rows[index][index])
        self.weights = list(self.forward)
        for index in reversed(range(len(self.forward))):
            self.weights[index] /= self.rows[index][index]
            for earlier in range(index):
                self.weights[earlier] -= self.weights[index] * self.rows[index][earlier]
        squares = 0.0
        for entry in self.forward:
            squares += entry * entry
        strength = SCALE_WEIGHT if self.beliefs.measured else 0.0
        if strength + len(self.forward) > 0:
            total = strength * self.beliefs.scale + squares
            self.scale = total / (strength + len(self.forward))

    def evidence(self):
        if not self.forward or self.scale <= 0:
            return 0.0
        freedom = (SCALE_WEIGHT if self.beliefs.measured else 0.0) + len(self.forward)
        evidence = -0.5 * freedom * math.log(self.scale * freedom)
        for index in range(len(self.forward)):
            evidence -= math.log(self.rows[index][index])
        return evidence

    def of(self, edits):
        """Mean and variance of a plan with these edits, in the order in which a descent takes them."""
        mean = variance = 0.0
        taken = []
        for edit in edits:
            kind = edit >= self.num_edits // 2
            offsets = 0.0
            for weight, point in zip(self.weights, self.points, strict=False):
                offsets += weight * self.counts(point)[kind]
            mean = mean + self.beliefs.effect[edit]
            mean += self.offset * offsets
            for weight, point in zip(self.weights, self.points, strict=False):
                if edit in point:
                    alike = float(sum(other in point for other in taken))
                    own = self.beliefs.variance[edit]
                    mean += weight * (own + self.interaction * alike)
            towards = 0.0
            for other in taken:
                towards += self.covariance[other][edit]
            variance = variance + 2.0 * towards + self.covariance[edit][edit]
            taken.append(edit)
        return mean, math.sqrt(max(variance, 0.0) * self.scale)


class Climber:
    def __init__(self, rules, beliefs):
        config = rules.config
        self.rules = rules
        self.models = [
            Posterior(beliefs, config.interaction * interaction, config.noise * noise)
            for interaction, noise in LADDER
        ]
        self.posterior = self.models[0]
        self.asked, self.within = set(), []
        self.best, self.best_plan = 0.0, rules.identity

    def edits_of(self, plan):
        skips = [layer for layer, action in enumerate(plan) if action == 0]
        return skips + [len(plan) + layer for layer, action in enumerate(plan) if action == 2]

    def add(self, plan):
        for model in self.models:
            model.add(self.edits_of(plan))
        self.asked.add(plan)
        if self.rules.is_legal(plan):
            self.within.append(plan)

    def tell(self, told):
        for gain, plan in told:
            if self.rules.is_legal(plan) and gain > self.best:
                self.best, self.best_plan = gain, plan
        for model in self.models:
            model.tell([gain for gain, _ in told])
        self.posterior = max(self.models, key=Posterior.evidence)

    def is_done(self):
        weight = self.rules.config.stop_at
        if weight == 0:
            return False
        found = better(self.descend(None, weight), self.beside_best(weight))
        return found is None or found[0] <= self.best

    def score(self, edits, weight):
        mean, deviation = self.posterior.of(edits)
        return mean + weight * deviation

    def children(self, plan, path, weight):
        """All (score, path, child), the best one first, the lowest edit first among equals."""
        scored = [
            (self.score([*path, edit], weight), [*path, edit], child)
            for edit, child in self.rules.legal_edits(plan)
        ]
        return sorted(scored, key=lambda entry: (-entry[0], entry[1][-1]))

    def fresh(self, children):
        return next((entry for entry in children if entry[2] not in self.asked), None)

    def beside_best(self, weight):
        """The best fresh plan with an edit more than the best plan told, or fewer, or in another's place."""
        best = self.best_plan
        found = self.fresh(self.children(best, self.edits_of(best), weight))
        for layer in range(len(best)):
            plan = (*best[:layer], 1, *best[layer + 1 :])
            if plan != best and self.rules.is_legal(plan):
                path = self.edits_of(plan)
                if plan not in self.asked:
                    found = better(found, (self.score(path, weight), path, plan))
                found = better(found, self.fresh(self.children(plan, path, weight)))
        return found

    def next(self, rng):
        """The plan to ask next; None if nothing is left."""
        weight = self.rules.config.exploration
        closely = len(self.asked) % 2 == 0
        if closely:
            weight = weight * CLOSELY
        found = self.descend(rng, weight)
        if closely:
            found = better(found, self.beside_best(weight))
        if found is None:
            for plan in self.within:
                found = self.fresh(self.children(plan, self.edits_of(plan), weight))
                if found:
                    break
        return found[2] if found else None

    def descend(self, rng, weight):
        plan, path, reached, found = self.rules.identity, [], -math.inf, None
        chance = self.rules.config.random_child if rng else 0.0
        while True:
            if chance > 0 and rng.unit() < chance:
                legal = self.rules.legal_edits(plan)
                if not legal:
                    return found
                edit, plan = legal[rng.below(len(legal))]
                path = [*path, edit]
                reached = self.score(path, weight)
                if plan not in self.asked:
                    return reached, path, plan
                continue
            children = self.children(plan, path, weight)
            found = better(found, self.fresh(children))
            if not children or not children[0][0] > reached:
                return found
            reached, path, plan = children[0]


def better(first, second):
    if first is None or (second is not None and second[0] > first[0]):
        return second
    return first
