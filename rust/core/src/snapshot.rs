//! Snapshots: a forest as bytes.
//!
//! A snapshot holds what the forest was made from and every evaluation with its reward. Restoring makes the forest
//! again and tells it the same rewards: the search is deterministic, so the same state comes out, and bytes that lie
//! cannot make an impossible one. If the plans that come out differ from those written, another version of the search
//! wrote them, and restoring fails.
//!
//! Layout, little-endian: magic `DDFOREST`, `u32` version, body, `u64` FNV-1a hash of all before it.

use std::collections::BTreeSet;

use crate::config::{is_usable, SearchConfig, Selection};
use crate::error::{Error, Result};
use crate::forest::Forest;
use crate::prior::EditPrior;
use crate::spec::ForestSpec;
use crate::tree::Tree;

const MAGIC: &[u8; 8] = b"DDFOREST";
const VERSION: u32 = 1;
/// Magic, version and hash.
const LEAST_LENGTH: usize = 20;

/// How far an evaluation had come.
const WAITING: u8 = 0;
const ISSUED: u8 = 1;
const TOLD: u8 = 2;

impl Forest {
    /// Writes the forest, open tickets included.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        put_u32(&mut bytes, VERSION);
        put_spec(&mut bytes, self.spec());
        put_len(&mut bytes, self.turn);
        for tree in self.trees() {
            put_len(&mut bytes, tree.evaluations.len());
            for (index, evaluation) in tree.evaluations.iter().enumerate() {
                bytes.extend_from_slice(&evaluation.plan);
                match evaluation.reward {
                    Some(reward) => {
                        bytes.push(TOLD);
                        put_f64(&mut bytes, reward);
                    }
                    None => bytes.push(if index < tree.issued { ISSUED } else { WAITING }),
                }
            }
        }
        let hash = fnv1a(&bytes);
        put_u64(&mut bytes, hash);
        bytes
    }

    /// Makes the forest that [`Forest::snapshot`] wrote. It goes on as that one would have, and takes its tickets.
    ///
    /// # Errors
    ///
    /// [`Error::Snapshot`] says what is wrong with the bytes; a setting out of range is [`Error::Setting`] and so on,
    /// as for [`Forest::new`].
    ///
    /// # Complexity
    ///
    /// That of the search so far.
    pub fn restore(bytes: &[u8]) -> Result<Self> {
        let mut reader = open(bytes)?;
        let spec = reader.spec()?;
        let num_layers = spec.num_layers;
        let mut forest = Self::new(spec)?;
        forest.turn = reader.len()?;
        if forest.turn >= forest.num_trees() {
            return Err(damaged("the turn belongs to no tree"));
        }
        let mut records = Vec::with_capacity(forest.num_trees());
        for _ in 0..forest.num_trees() {
            let count = reader.count(num_layers + 1)?;
            let tree: Result<Vec<Record>> = (0..count).map(|_| reader.record(num_layers)).collect();
            records.push(tree?);
        }
        if !reader.rest.is_empty() {
            return Err(damaged("there are bytes after its end"));
        }
        replay(&mut forest, &records)?;
        Ok(forest)
    }
}

struct Record {
    plan: Vec<u8>,
    status: u8,
    reward: f64,
}

/// Tells a new forest what the one that was written had been told, round by round.
fn replay(forest: &mut Forest, records: &[Vec<Record>]) -> Result<()> {
    let mut current: BTreeSet<usize> = (0..records.len()).collect();
    while !current.is_empty() {
        let mut advanced = BTreeSet::new();
        for &index in &current {
            let Some(tree) = forest.tree_mut(index) else {
                continue;
            };
            if replay_round(tree, &records[index])
                .map_err(|reason| Error::Snapshot(format!("tree {index}: {reason}")))?
            {
                advanced.insert(index);
            }
        }
        let waits_for_probe = !forest.is_searching();
        forest.go_on(&advanced);
        current = if waits_for_probe && forest.is_searching() {
            (0..records.len()).collect()
        } else {
            advanced
        };
    }
    for (index, (tree, record)) in forest.trees().iter().zip(records).enumerate() {
        if tree.evaluations.len() != record.len() {
            let (asks, holds) = (tree.evaluations.len(), record.len());
            return Err(Error::Snapshot(format!(
                "tree {index} holds {holds} plans where this version of the search asks {asks}"
            )));
        }
    }
    Ok(())
}

/// Takes over what is recorded of a tree's current plans; returns whether that settles a round.
fn replay_round(tree: &mut Tree, records: &[Record]) -> std::result::Result<bool, String> {
    let mut told = false;
    for index in tree.untold_from()..tree.evaluations.len() {
        let Some(record) = records.get(index) else {
            return Err(format!("plan {index} is missing"));
        };
        if *record.plan != *tree.evaluations[index].plan {
            return Err(format!(
                "plan {index} is not the one that this version of the search asks"
            ));
        }
        if record.status != WAITING {
            if tree.issued < index {
                return Err(format!(
                    "plan {index} was handed out before plan {}",
                    tree.issued
                ));
            }
            tree.issued = tree.issued.max(index + 1);
        }
        if record.status == TOLD && tree.evaluations[index].reward.is_none() {
            if !is_usable(record.reward) {
                return Err(format!("the reward of plan {index} is {}", record.reward));
            }
            tree.tell(index, record.reward);
            told = true;
        }
    }
    Ok(told && tree.is_settled())
}

fn open(bytes: &[u8]) -> Result<Reader<'_>> {
    if bytes.len() < LEAST_LENGTH || !bytes.starts_with(MAGIC) {
        return Err(damaged(
            "it is not a snapshot of a forest, or it is cut off",
        ));
    }
    let mut reader = Reader {
        rest: &bytes[MAGIC.len()..],
    };
    let version = reader.u32()?;
    if version != VERSION {
        return Err(Error::Snapshot(format!(
            "it has version {version}, this build reads version {VERSION}; restore it with the build that wrote it"
        )));
    }
    let (content, hash) = bytes.split_at(bytes.len() - 8);
    if (Reader { rest: hash }).u64()? != fnv1a(content) {
        return Err(damaged("its hash is wrong, so it is cut off or damaged"));
    }
    let (body, _) = reader.rest.split_at(reader.rest.len() - 8);
    Ok(Reader { rest: body })
}

/// Fowler-Noll-Vo 1a, 64 bits: notices damage, not malice.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn damaged(reason: &str) -> Error {
    Error::Snapshot(reason.to_owned())
}

fn put_u32(bytes: &mut Vec<u8>, number: u32) {
    bytes.extend_from_slice(&number.to_le_bytes());
}

fn put_u64(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend_from_slice(&number.to_le_bytes());
}

fn put_f64(bytes: &mut Vec<u8>, number: f64) {
    put_u64(bytes, number.to_bits());
}

fn put_len(bytes: &mut Vec<u8>, number: usize) {
    put_u64(bytes, number as u64);
}

fn put_spec(bytes: &mut Vec<u8>, spec: &ForestSpec) {
    let config = &spec.config;
    put_len(bytes, spec.num_layers);
    put_u64(bytes, spec.seed);
    put_len(bytes, spec.tree_keys.len());
    for &key in &spec.tree_keys {
        put_u64(bytes, key);
    }
    for number in [
        config.max_evaluations,
        config.max_repeats,
        config.max_edits,
        config.probe_trees,
        config.round_size,
    ] {
        put_u32(bytes, number);
    }
    for number in [
        config.depth_penalty,
        config.exploration,
        config.max_depth,
        config.virtual_loss,
        config.temperature,
        config.prior_weight,
        config.random_child,
    ] {
        put_f64(bytes, number);
    }
    bytes.push(match config.selection {
        Selection::Puct => 0,
        Selection::DrLlm => 1,
    });
    put_len(bytes, config.protect.len());
    for &layer in &config.protect {
        put_u32(bytes, layer);
    }
    match &spec.prior {
        None => bytes.push(0),
        Some(prior) => {
            bytes.push(1);
            put_u32(bytes, prior.count);
            for numbers in [&prior.mean, &prior.variance] {
                put_len(bytes, numbers.len());
                for &number in numbers {
                    put_f64(bytes, number);
                }
            }
        }
    }
}

/// Reads what the `put` functions wrote; every length is checked against the bytes that are left.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        if count > self.rest.len() {
            return Err(damaged("it ends too early"));
        }
        let (taken, rest) = self.rest.split_at(count);
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?
            .try_into()
            .map_err(|_| damaged("it ends too early"))
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn f64(&mut self) -> Result<f64> {
        Ok(f64::from_bits(self.u64()?))
    }

    fn len(&mut self) -> Result<usize> {
        usize::try_from(self.u64()?).map_err(|_| damaged("a number in it is too large"))
    }

    /// Reads how many entries of at least `size` bytes follow.
    fn count(&mut self, size: usize) -> Result<usize> {
        let count = self.len()?;
        if count > self.rest.len() / size {
            return Err(damaged("it promises more entries than it has bytes"));
        }
        Ok(count)
    }

    fn f64s(&mut self) -> Result<Vec<f64>> {
        let count = self.count(8)?;
        (0..count).map(|_| self.f64()).collect()
    }

    fn spec(&mut self) -> Result<ForestSpec> {
        let num_layers = self.len()?;
        let seed = self.u64()?;
        let count = self.count(8)?;
        let tree_keys: Result<Vec<u64>> = (0..count).map(|_| self.u64()).collect();
        let tree_keys = tree_keys?;
        let mut config = SearchConfig {
            max_evaluations: self.u32()?,
            max_repeats: self.u32()?,
            max_edits: self.u32()?,
            probe_trees: self.u32()?,
            round_size: self.u32()?,
            depth_penalty: self.f64()?,
            exploration: self.f64()?,
            max_depth: self.f64()?,
            virtual_loss: self.f64()?,
            temperature: self.f64()?,
            prior_weight: self.f64()?,
            random_child: self.f64()?,
            selection: match self.u8()? {
                0 => Selection::Puct,
                1 => Selection::DrLlm,
                _ => return Err(damaged("it names an unknown rule of selection")),
            },
            protect: Vec::new(),
        };
        let count = self.count(4)?;
        let protect: Result<Vec<u32>> = (0..count).map(|_| self.u32()).collect();
        config.protect = protect?;
        let prior = match self.u8()? {
            0 => None,
            1 => {
                let count = self.u32()?;
                Some(EditPrior {
                    count,
                    mean: self.f64s()?,
                    variance: self.f64s()?,
                })
            }
            _ => return Err(damaged("it is unclear whether it has a prior")),
        };
        Ok(ForestSpec {
            num_layers,
            config,
            seed,
            tree_keys,
            prior,
        })
    }

    fn record(&mut self, num_layers: usize) -> Result<Record> {
        let plan = self.take(num_layers)?.to_vec();
        let status = self.u8()?;
        if status > TOLD {
            return Err(damaged("an evaluation has an unknown state"));
        }
        let reward = if status == TOLD {
            self.f64()?
        } else {
            f64::NAN
        };
        Ok(Record {
            plan,
            status,
            reward,
        })
    }
}
