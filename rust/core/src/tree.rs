//! One tree: the search over the plans of one prompt.
//!
//! A tree works in *rounds*: it chooses up to `round_size` plans at once, and learns from their rewards together, in
//! the order of the plans, when the last one is told. So neither the order of the tells nor what other trees do
//! changes what it asks.

use crate::climb::Climber;
use crate::config::{SearchConfig, Selection};
use crate::edits::{positive_median, target, Guide, Limits};
use crate::evaluation::{value, Evaluation};
use crate::node::{Graph, Node, ROOT};
use crate::plan::{self, SKIP};
use crate::rng::SplitMix64;
use crate::select::{score, ChildView, ParentView, Score};

/// The changes of the signal by one edit, from a told plan to a told plan with that edit more.
#[derive(Debug, Clone, Copy, Default)]
struct Change {
    sum: f64,
    count: u32,
}

/// What every tree of a forest shares.
pub(crate) struct Shared<'a> {
    pub(crate) config: &'a SearchConfig,
    pub(crate) limits: &'a Limits,
    pub(crate) num_layers: usize,
}

/// The search over the plans of one prompt.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    graph: Graph,
    pub(crate) evaluations: Vec<Evaluation>,
    /// First evaluation of the current round.
    round_start: usize,
    /// Evaluations that `ask` has handed out.
    pub(crate) issued: usize,
    /// Evaluations that have been told.
    told: usize,
    /// Evaluations that count towards `max_evaluations`.
    spent: u32,
    /// |signal - the identity's signal| of the told plans, ascending.
    spreads: Vec<f64>,
    /// What each edit has changed in this tree.
    changes: Vec<Change>,
    /// Under the posterior's rule, in place of the graph; `None` before the prior is known.
    climber: Option<Climber>,
    /// Whether the posterior has ended the search before its evaluations were spent.
    stopped: bool,
    rng: SplitMix64,
}

impl Tree {
    pub(crate) fn new(num_layers: usize, rng: SplitMix64) -> Self {
        Self {
            graph: Graph::new(num_layers),
            evaluations: Vec::new(),
            round_start: 0,
            issued: 0,
            told: 0,
            spent: 0,
            spreads: Vec::new(),
            changes: vec![Change::default(); 2 * num_layers],
            climber: None,
            stopped: false,
            rng,
        }
    }

    /// Plans chosen but not handed out yet.
    pub(crate) fn waiting(&self) -> usize {
        self.evaluations.len() - self.issued
    }

    /// Whether every chosen plan has been told.
    pub(crate) fn is_settled(&self) -> bool {
        self.told == self.evaluations.len()
    }

    /// Opens with the identity plan alone: nothing can be compared before it is told.
    pub(crate) fn open_search(&mut self, shared: &Shared<'_>) {
        self.choose(Vec::new(), shared);
        self.spent = 1;
    }

    /// Opens with the identity plan and the given single edits, legal by themselves or not.
    pub(crate) fn open_probe(&mut self, edits: &[usize], shared: &Shared<'_>) {
        self.open_search(shared);
        for &edit in edits {
            let root = self.graph.node(ROOT);
            if shared.limits.allows(&root.plan, root.usage, edit) {
                self.graph.add(ROOT, edit, 0.0);
                self.choose(vec![edit], shared);
            } else {
                let (layer, action) = target(edit, shared.num_layers);
                let mut plan = root.plan.clone();
                plan[layer] = action;
                self.record(plan, None, shared);
            }
        }
    }

    /// Notes the reward of an evaluation that has been handed out and not been told.
    pub(crate) fn tell(&mut self, index: usize, reward: f64) {
        self.evaluations[index].reward = Some(reward);
        self.told += 1;
    }

    /// Learns from a settled round.
    pub(crate) fn learn(&mut self, guide: &Guide, shared: &Shared<'_>) {
        if shared.config.selection == Selection::Posterior {
            self.learn_gains(guide, shared);
            return;
        }
        for index in self.round_start..self.evaluations.len() {
            let evaluation = &self.evaluations[index];
            let (Some(path), Some(reward)) = (&evaluation.path, evaluation.reward) else {
                continue;
            };
            let signal = match shared.config.selection {
                Selection::Posterior | Selection::Puct => {
                    value(reward, &evaluation.plan, shared.config)
                }
                Selection::DrLlm => reward,
            };
            self.graph.close(path, signal);
            for (edit, parent) in self.graph.told_parents(&evaluation.plan) {
                self.changes[edit].sum += signal - parent;
                self.changes[edit].count += 1;
            }
            if !path.is_empty() {
                let spread = (signal - self.graph.node(ROOT).signal).abs();
                let place = self.spreads.partition_point(|&other| other < spread);
                self.spreads.insert(place, spread);
            }
        }
        self.round_start = self.evaluations.len();
    }

    /// Learns the gains of a settled round over the identity plan, whose reward is the first that is told.
    fn learn_gains(&mut self, guide: &Guide, shared: &Shared<'_>) {
        let config = shared.config;
        let base = self.evaluations.first().and_then(|identity| {
            let reward = identity.reward?;
            Some(value(reward, &identity.plan, config))
        });
        let climber = self
            .climber
            .get_or_insert_with(|| Climber::new(guide, config));
        let mut told = Vec::new();
        for (index, evaluation) in self.evaluations.iter().enumerate().skip(self.round_start) {
            if !evaluation.noted {
                climber.add(&evaluation.plan, guide, shared.limits);
            }
            if let (Some(base), Some(reward), true) = (base, evaluation.reward, index > 0) {
                let gain = value(reward, &evaluation.plan, config) - base;
                told.push((gain, evaluation.admitted, &*evaluation.plan));
            }
        }
        climber.tell(&told, guide);
        self.round_start = self.evaluations.len();
    }

    /// Chooses plans by the posterior, each in the light of those chosen before it.
    fn climb(&mut self, count: u32, guide: &Guide, shared: &Shared<'_>) {
        let Some(climber) = &mut self.climber else {
            return;
        };
        if shared.config.stop_at > 0.0 && climber.is_done(guide, shared.limits, shared.config) {
            self.stopped = true;
            return;
        }
        for _ in 0..count {
            let next = climber.next(guide, shared.limits, shared.config, &mut self.rng);
            let Some(next) = next else {
                break;
            };
            climber.add(&next.plan, guide, shared.limits);
            self.evaluations.push(Evaluation {
                admitted: shared.limits.admits(&next.plan),
                plan: next.plan,
                path: None,
                reward: None,
                noted: true,
            });
            self.spent += 1;
        }
    }

    /// Chooses the plans of the next round; none if the evaluations are spent or nothing is left to ask.
    pub(crate) fn choose_round(&mut self, guide: &Guide, shared: &Shared<'_>) {
        let left = shared.config.max_evaluations.saturating_sub(self.spent);
        if shared.config.selection == Selection::Posterior {
            if !self.stopped {
                self.climb(left.min(shared.config.round_size), guide, shared);
            }
            return;
        }
        for _ in 0..left.min(shared.config.round_size) {
            let Some(path) = self.descend(guide, shared) else {
                break;
            };
            self.choose(path, shared);
            self.spent += 1;
        }
    }

    /// Finds a plan that has not been asked, adds it to the graph and returns its path.
    fn descend(&mut self, guide: &Guide, shared: &Shared<'_>) -> Option<Vec<usize>> {
        let mut path = Vec::new();
        let mut nodes = vec![ROOT];
        while let Some(&at) = nodes.last() {
            if let Some((edit, child)) = self.best_child(at, guide, shared) {
                path.push(edit);
                let Some(child) = child else {
                    let signal = self.graph.node(at).signal + self.effect(edit, guide, shared);
                    self.graph.add(at, edit, signal);
                    return Some(path);
                };
                nodes.push(child);
            } else {
                self.graph.mark_complete(at);
                nodes.pop();
                path.pop();
            }
        }
        None
    }

    /// Returns the edit to take at a node and the child's node, if it has one; `None` if no child is left.
    fn best_child(
        &mut self,
        at: usize,
        guide: &Guide,
        shared: &Shared<'_>,
    ) -> Option<(usize, Option<usize>)> {
        let node = self.graph.node(at);
        let mut asked = node.edges.iter().peekable();
        let mut children = Vec::new();
        let mut total_weight = 0.0;
        for edit in 0..shared.limits.num_edits() {
            let edge = asked.next_if(|edge| edge.edit == edit);
            if shared.limits.allows(&node.plan, node.usage, edit) {
                total_weight += guide.weight[edit];
                if edge.is_none_or(|edge| !self.graph.node(edge.child).complete) {
                    children.push((edit, edge));
                }
            }
        }
        if shared.config.random_child > 0.0 && !children.is_empty() {
            let drawn = self.rng.unit() < shared.config.random_child;
            if drawn {
                let (edit, edge) = children[self.rng.below(children.len())];
                return Some((edit, edge.map(|edge| edge.child)));
            }
        }
        let parent = ParentView {
            visits: node.count + node.open,
            unit: self.unit(guide),
        };
        let mut best: Option<(Score, (usize, Option<usize>))> = None;
        for (edit, edge) in children {
            let visits = if target(edit, shared.num_layers).1 == SKIP {
                node.usage.visits - 1
            } else {
                node.usage.visits + 1
            };
            let known = edge.map(|edge| self.graph.node(edge.child));
            let view = ChildView {
                mean: known.map_or_else(
                    || node.signal + self.effect(edit, guide, shared),
                    Node::mean,
                ),
                count: known.map_or(0, |child| child.count),
                open: known.map_or(0, |child| child.open),
                edge_visits: edge.map_or(0, |edge| edge.count + edge.open),
                fresh: edge.is_none(),
                probability: guide.weight[edit] / total_weight,
                depth: plan::fraction(visits, shared.num_layers),
            };
            let scored = score(shared.config, &parent, &view);
            if best.as_ref().is_none_or(|(other, _)| scored > *other) {
                best = Some((scored, (edit, edge.map(|edge| edge.child))));
            }
        }
        best.map(|(_, choice)| choice)
    }

    /// What an edit is expected to change: the mean of what it did in this tree, where the prior counts as
    /// `prior_weight` such changes.
    fn effect(&self, edit: usize, guide: &Guide, shared: &Shared<'_>) -> f64 {
        let Change { sum, count } = self.changes[edit];
        if count == 0 {
            return guide.effect[edit];
        }
        let weight = shared.config.prior_weight;
        (weight * guide.effect[edit] + sum) / (weight + f64::from(count))
    }

    /// Unit of the bonus and of the virtual loss: the tree's own spread, the prior's until it has one.
    fn unit(&self, guide: &Guide) -> f64 {
        positive_median(&self.spreads).unwrap_or(guide.spread)
    }

    /// Adds an evaluation at the end of a path in the graph, as open.
    fn choose(&mut self, path: Vec<usize>, shared: &Shared<'_>) {
        self.graph.open(&path);
        let mut plan = self.graph.node(ROOT).plan.clone();
        for &edit in &path {
            let (layer, action) = target(edit, shared.num_layers);
            plan[layer] = action;
        }
        self.record(plan, Some(path), shared);
    }

    fn record(&mut self, plan: Box<[u8]>, path: Option<Vec<usize>>, shared: &Shared<'_>) {
        let admitted = shared.limits.admits(&plan);
        self.evaluations.push(Evaluation {
            plan,
            path,
            reward: None,
            admitted,
            noted: false,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    /// Searches a tree to its end on random rewards in quarters, whose sums are exact in any order.
    #[allow(clippy::cast_precision_loss)]
    fn searched(config: &SearchConfig, num_layers: usize, seed: u64) -> Tree {
        let limits = Limits::new(num_layers, config);
        let shared = Shared {
            config,
            limits: &limits,
            num_layers,
        };
        let guide = Guide::new(&limits, config, None);
        let mut tree = Tree::new(num_layers, SplitMix64::new(seed));
        let mut rewards = SplitMix64::new(seed);
        tree.open_search(&shared);
        while !tree.is_settled() {
            for index in tree.round_start..tree.evaluations.len() {
                tree.tell(index, rewards.below(40) as f64 / 4.0);
            }
            tree.learn(&guide, &shared);
            tree.choose_round(&guide, &shared);
        }
        tree
    }

    #[test]
    fn rewards_are_conserved_along_every_path() {
        for seed in 0..200 {
            let selection = if seed % 2 == 0 {
                Selection::Puct
            } else {
                Selection::DrLlm
            };
            let config = SearchConfig {
                max_evaluations: 60,
                depth_penalty: 0.0,
                exploration: 1.0,
                selection,
                random_child: 0.2,
                max_depth: 1.5,
                ..SearchConfig::default()
            };
            let tree = searched(&config, 5, seed);
            let told: f64 = tree.evaluations.iter().filter_map(|one| one.reward).sum();
            let root = tree.graph.node(ROOT);
            assert_eq!(root.total.to_bits(), told.to_bits());
            assert_eq!(root.count as usize, tree.evaluations.len());
            // Each plan is told once, so a node's descents are its own one and those of its edges.
            for index in 0..tree.graph.len() {
                let node = tree.graph.node(index);
                let below: u32 = node.edges.iter().map(|edge| edge.count).sum();
                assert_eq!((node.count, node.open, node.told), (1 + below, 0, true));
                assert!(node.edges.iter().all(|edge| edge.open == 0));
                assert!(node
                    .edges
                    .windows(2)
                    .all(|pair| pair[0].edit < pair[1].edit));
            }
        }
    }

    #[test]
    fn a_search_branches() {
        let config = SearchConfig {
            max_evaluations: 50,
            exploration: 0.5,
            selection: Selection::Puct,
            ..SearchConfig::default()
        };
        let tree = searched(&config, 8, 3);
        let widest = (0..tree.graph.len())
            .map(|index| tree.graph.node(index).edges.len())
            .max();
        assert!(widest > Some(4), "{widest:?}");
    }
}
