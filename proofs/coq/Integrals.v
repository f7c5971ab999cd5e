(** Local integrated gradients from zero: the rule behind secants, scales and halves.

    Along the ray t u, 0 <= t <= 1, let phi(t) = f(t u). Where phi is continuously differentiable,
    the averaged Jacobian J~ = integral of J(t u) gives  J~ u = phi(1) - phi(0) = f(u) - f(0). *)
From Coq Require Import Reals Lra Ranalysis_reg.
Local Open Scope R_scope.

Theorem averaged_is_complete (phi : C1_fun) (pr : Riemann_integrable (derive phi (diff0 phi)) 0 1) :
  RiemannInt pr + phi 0 = phi 1.
Proof. rewrite FTC_Riemann. ring. Qed.

(** Elementwise f: J~ u = f(u) - f(0), so J~ is the secant wherever u is not 0. *)
Theorem integral_is_secant (f : R -> R) (u : R) (phi : C1_fun)
    (pr : Riemann_integrable (derive phi (diff0 phi)) 0 1) (average : R) :
  (forall t, phi t = f (t * u)) -> average * u = RiemannInt pr -> u <> 0 ->
  average = (f u - f 0) / u.
Proof.
  intros Hphi Ha Hu. pose proof (averaged_is_complete phi pr) as H.
  rewrite !Hphi, Rmult_0_l, Rmult_1_l, <- Ha in H.
  apply (Rmult_eq_reg_r u); auto. unfold Rdiv. rewrite Rmult_assoc, Rinv_l by auto. lra.
Qed.

(** At 0 the secant is taken to be f'(0), and that is its limit. *)
Theorem secant_has_limit (f : R -> R) (d : R) :
  derivable_pt_lim f 0 d ->
  forall eps, 0 < eps -> exists delta : posreal, forall u,
    u <> 0 -> Rabs u < delta -> Rabs ((f u - f 0) / u - d) < eps.
Proof.
  intros H eps He. destruct (H eps He) as [delta Hd]. exists delta. intros u Hu Hlt.
  specialize (Hd u Hu Hlt). now rewrite Rplus_0_l in Hd.
Qed.

(** Of degree k >= 1, J(t u) = t^(k-1) J(u): the average is J(u)/k, the scale 1/k; of a product of
    two values, k = 2, it is the half. Both are the integral of a power. *)
Lemma power_grows k t : derivable_pt_lim (fun s => s ^ S k / INR (S k)) t (t ^ k).
Proof.
  replace (t ^ k) with (/ INR (S k) * (INR (S k) * t ^ pred (S k))).
  - apply (derivable_pt_lim_ext (mult_real_fct (/ INR (S k)) (fun s => s ^ S k))).
    + intros s. unfold mult_real_fct, Rdiv. ring.
    + apply derivable_pt_lim_scal, derivable_pt_lim_pow.
  - simpl pred. field. apply not_0_INR. discriminate.
Qed.

Theorem average_of_power (k : nat) (phi : C1_fun)
    (pr : Riemann_integrable (derive phi (diff0 phi)) 0 1) :
  (forall t, phi t = t ^ S k / INR (S k)) -> RiemannInt pr = / INR (S k).
Proof.
  intros Hphi. pose proof (averaged_is_complete phi pr) as H. rewrite !Hphi, pow1 in H.
  replace (0 ^ S k) with 0 in H by (simpl; ring). unfold Rdiv in H. lra.
Qed.
