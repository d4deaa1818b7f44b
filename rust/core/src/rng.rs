//! The crate's own random numbers, so that a seed means the same on every machine and in every version.

/// `SplitMix64` (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// Starts the sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Starts a sequence of its own for each key under one seed.
    ///
    /// # Examples
    ///
    /// ```
    /// use dynadepth_core::rng::SplitMix64;
    /// assert_ne!(SplitMix64::keyed(0, 1).next_u64(), SplitMix64::keyed(0, 2).next_u64());
    /// ```
    #[must_use]
    pub fn keyed(seed: u64, key: u64) -> Self {
        let start = Self::new(seed).next_u64();
        Self::new(Self::new(start ^ key).next_u64())
    }

    /// Returns the next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Returns a number in [0, 1), a multiple of 2^-53.
    #[allow(clippy::cast_precision_loss)] // 53 bits are exact
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Returns an index below `limit` (0 if `limit` is 0), by the high half of a 128-bit product.
    #[allow(clippy::cast_possible_truncation)] // the high half of the product is below `limit`
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.next_u64()) * limit as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_published_sequence() {
        // First outputs of the reference implementation for seed 1234567.
        let mut rng = SplitMix64::new(1_234_567);
        let drawn: Vec<u64> = (0..3).map(|_| rng.next_u64()).collect();
        assert_eq!(
            drawn,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn stays_in_range() {
        let mut rng = SplitMix64::keyed(1, 2);
        for limit in [1, 2, 56, 1000] {
            assert!((0..200).all(|_| rng.below(limit) < limit));
        }
        assert!((0..1000)
            .map(|_| rng.unit())
            .all(|unit| (0.0..1.0).contains(&unit)));
        assert_eq!(rng.below(0), 0);
    }
}
