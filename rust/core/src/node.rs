//! Nodes of one tree's graph of plans, and the table that merges the orders of edits.

use std::collections::HashMap;

use crate::edits::{edit_of, target, Usage};
use crate::plan::{identity, EXECUTE};

/// Index of the identity plan's node.
pub(crate) const ROOT: usize = 0;

/// A way from a plan to the plan with one edit more.
#[derive(Debug, Clone)]
pub(crate) struct Edge {
    pub(crate) edit: usize,
    pub(crate) child: usize,
    /// Told descents along this edge.
    pub(crate) count: u32,
    /// Open descents along this edge.
    pub(crate) open: u32,
}

/// A plan that has been asked, and what is known of the plans below it.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) plan: Box<[u8]>,
    pub(crate) usage: Usage,
    /// The plan's own signal: what it was expected to be, until it is told.
    pub(crate) signal: f64,
    /// Told descents through or to the node.
    pub(crate) count: u32,
    /// Open descents through or to the node.
    pub(crate) open: u32,
    /// Sum of the signals that these told descents ended at.
    pub(crate) total: f64,
    /// Whether the plan itself has been told.
    pub(crate) told: bool,
    /// Nothing at or below this node is left to ask.
    pub(crate) complete: bool,
    /// Edges to the children that have been asked, by ascending edit.
    pub(crate) edges: Vec<Edge>,
}

impl Node {
    /// Mean signal of the told descents; the plan's own signal if there are none.
    pub(crate) fn mean(&self) -> f64 {
        if self.count == 0 {
            self.signal
        } else {
            self.total / f64::from(self.count)
        }
    }
}

/// The plans of one tree: a directed acyclic graph, since each edge adds an edit.
#[derive(Debug, Clone)]
pub(crate) struct Graph {
    num_layers: usize,
    nodes: Vec<Node>,
    /// Node of each plan. Only looked up, never iterated.
    table: HashMap<Box<[u8]>, usize>,
}

impl Graph {
    /// A graph of the identity plan alone, whose signal is not known.
    pub(crate) fn new(num_layers: usize) -> Self {
        let mut graph = Self {
            num_layers,
            nodes: Vec::new(),
            table: HashMap::new(),
        };
        graph.push(identity(num_layers).into_boxed_slice(), 0.0);
        graph
    }

    pub(crate) fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn mark_complete(&mut self, index: usize) {
        self.nodes[index].complete = true;
    }

    /// Adds the plan that an edit makes of a node's, and joins it to every parent and child in the graph: either may
    /// have come first, by another order of the edits.
    pub(crate) fn add(&mut self, parent: usize, edit: usize, signal: f64) {
        let (layer, action) = target(edit, self.num_layers);
        let mut plan = self.nodes[parent].plan.clone();
        plan[layer] = action;
        let added = self.push(plan.clone(), signal);
        for (edit, parent) in self.parents(&plan) {
            self.join(parent, edit, added);
        }
        for (edit, child) in self.children(&plan) {
            self.join(added, edit, child);
        }
    }

    fn join(&mut self, parent: usize, edit: usize, child: usize) {
        let edges = &mut self.nodes[parent].edges;
        let place = edges.partition_point(|edge| edge.edit < edit);
        edges.insert(
            place,
            Edge {
                edit,
                child,
                count: 0,
                open: 0,
            },
        );
    }

    /// Returns the told parents of a plan, by ascending layer: the edit that leads from each, and its signal.
    pub(crate) fn told_parents(&self, plan: &[u8]) -> Vec<(usize, f64)> {
        let mut parents = self.parents(plan);
        parents.retain(|&(_, parent)| self.nodes[parent].told);
        parents
            .into_iter()
            .map(|(edit, parent)| (edit, self.nodes[parent].signal))
            .collect()
    }

    /// Returns the parents of a plan that are in the graph, by ascending layer, and the edit that leads from each.
    fn parents(&self, plan: &[u8]) -> Vec<(usize, usize)> {
        let mut parents = Vec::new();
        let mut other: Box<[u8]> = plan.into();
        for (layer, &action) in plan.iter().enumerate() {
            let Some(edit) = edit_of(layer, action, self.num_layers) else {
                continue;
            };
            other[layer] = EXECUTE;
            if let Some(&parent) = self.table.get(&other) {
                parents.push((edit, parent));
            }
            other[layer] = action;
        }
        parents
    }

    /// Returns the children of a plan that are in the graph, by ascending edit, and the edit that leads to each.
    fn children(&self, plan: &[u8]) -> Vec<(usize, usize)> {
        let mut children = Vec::new();
        let mut other: Box<[u8]> = plan.into();
        for edit in 0..2 * self.num_layers {
            let (layer, action) = target(edit, self.num_layers);
            if plan[layer] != EXECUTE {
                continue;
            }
            other[layer] = action;
            if let Some(&child) = self.table.get(&other) {
                children.push((edit, child));
            }
            other[layer] = EXECUTE;
        }
        children
    }

    /// Counts a descent from the root along `path` as open.
    pub(crate) fn open(&mut self, path: &[usize]) {
        self.walk(path, |node| node.open += 1, |edge| edge.open += 1);
    }

    /// Turns an open descent into a told one that ended at `signal`.
    pub(crate) fn close(&mut self, path: &[usize], signal: f64) {
        let leaf = self.walk(
            path,
            |node| {
                node.open -= 1;
                node.count += 1;
                node.total += signal;
            },
            |edge| {
                edge.open -= 1;
                edge.count += 1;
            },
        );
        self.nodes[leaf].signal = signal;
        self.nodes[leaf].told = true;
    }

    /// Visits the nodes and edges of a path of edits, and returns its last node.
    fn walk(
        &mut self,
        path: &[usize],
        mut at_node: impl FnMut(&mut Node),
        mut at_edge: impl FnMut(&mut Edge),
    ) -> usize {
        let mut index = ROOT;
        at_node(&mut self.nodes[index]);
        for &edit in path {
            // A descent only takes edges that exist, and none is ever removed.
            let node = &mut self.nodes[index];
            let Some(edge) = node.edges.iter_mut().find(|edge| edge.edit == edit) else {
                break;
            };
            at_edge(edge);
            index = edge.child;
            at_node(&mut self.nodes[index]);
        }
        index
    }

    fn push(&mut self, plan: Box<[u8]>, signal: f64) -> usize {
        let index = self.nodes.len();
        self.table.insert(plan.clone(), index);
        self.nodes.push(Node {
            usage: Usage::of(&plan),
            plan,
            signal,
            count: 0,
            open: 0,
            total: 0.0,
            told: false,
            complete: false,
            edges: Vec::new(),
        });
        index
    }
}
